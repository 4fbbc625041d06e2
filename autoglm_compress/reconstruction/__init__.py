"""What the structural stages share: the walk, statistics, surgery, least squares and the refit."""
