"""The reliability scorecard: `rmipo-lite selftest` tries to lose a run and counts its losses."""
