"""`python -m trainer run`: every process of the path on one machine, watched, checked and reported."""
