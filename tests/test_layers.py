"""The house keeps its order: every import of the package, wherever it stands, goes one way."""

from __future__ import annotations

import pytest

from scripts.architecture import FLOOR, PACKAGE, PICTURE, picture, read, sources, violations

MOST_LINES, MOST_FILES, MOST_ON_THE_LANDING = 400, 14, 5


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return sources()


def test_imports_go_one_way_through_faces_and_in_no_circle(texts: dict[str, str]) -> None:
    assert violations(read(texts)) == []


@pytest.mark.parametrize(
    ("module", "line", "told"),
    [
        (
            "data.files",
            "def f():\n    from rmipo_lite.data.rows import Row\n",
            "circle: ",
        ),
        (
            "ops.head",
            "def f():\n    from rmipo_lite.step.pair_step import PairStep\n",
            "rmipo_lite.ops.head imports upward: rmipo_lite.step.pair_step PairStep",
        ),
        (
            "ops.head",
            "if TYPE_CHECKING:\n    from rmipo_lite.config import RMiPOConfig\n",
            "rmipo_lite.ops.head imports upward: rmipo_lite.config RMiPOConfig",
        ),
        (
            "output.page",
            "from rmipo_lite.ops import linear_logps\n",
            "rmipo_lite.output.page imports upward: rmipo_lite.ops linear_logps",
        ),
        (
            "training.trainer",
            "from rmipo_lite.model.batch import _rows\n",
            "rmipo_lite.training.trainer takes the private rmipo_lite.model.batch._rows",
        ),
        (
            "training.trainer",
            "from rmipo_lite.model import loading\nloading._NO_CODE\n",
            "rmipo_lite.training.trainer takes the private rmipo_lite.model.loading._NO_CODE",
        ),
        (
            "training.trainer",
            "from rmipo_lite.data.cells import unflatten\n",
            "rmipo_lite.training.trainer imports rmipo_lite.data.cells, which its room doesn't",
        ),
        ("attic.old", "", "rmipo_lite.attic.old is in no room of the order"),
    ],
)
def test_what_breaks_the_order_is_found(
    module: str, line: str, told: str, texts: dict[str, str]
) -> None:
    name = f"rmipo_lite.{module}"
    planted = {**texts, name: f"{texts.get(name, '')}\n{line}"}
    assert any(found.startswith(told) for found in violations(read(planted)))


def test_files_and_rooms_are_small(texts: dict[str, str]) -> None:
    assert [name for name, text in texts.items() if text.count("\n") > MOST_LINES] == []
    for room in (path for path in PACKAGE.iterdir() if path.is_dir()):
        assert len(list(room.glob("*.py"))) <= MOST_FILES, room.name
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ON_THE_LANDING


def test_every_face_says_in_two_lines_what_the_room_is_for() -> None:
    for face in PACKAGE.glob("*/__init__.py"):
        text = face.read_text(encoding="utf-8")
        said = [line for line in text.split('"""')[1].splitlines() if line]
        assert 1 < len(said) <= 4, face
        assert "__all__" in text, face


def test_no_module_hides_a_public_function() -> None:
    """With lazy imports `rmipo_lite.train` would be the module and not the function."""
    import rmipo_lite

    hidden = FLOOR.keys() & set(rmipo_lite.__all__)
    hidden |= {name for name in rmipo_lite.__all__ for _ in PACKAGE.rglob(f"{name}.py")}
    assert hidden == set()


def test_the_public_surface_is_importable() -> None:
    import rmipo_lite

    for name in rmipo_lite.__all__:
        assert getattr(rmipo_lite, name) is not None


def test_the_picture_in_the_docs_is_of_these_imports(texts: dict[str, str]) -> None:
    """Redraw it with `python scripts/architecture.py`."""
    assert PICTURE.read_text(encoding="utf-8") == picture(read(texts))
