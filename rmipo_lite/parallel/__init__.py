"""Several processes that train one model together, each computing a share of every step's pairs.

`group` says who this process is among them, and where they meet; `sharded` is of a model of which
each holds a part, whose passes are meetings too; `once` of what one does for all.
"""

from rmipo_lite.parallel import group, once, sharded

__all__ = ["group", "once", "sharded"]
