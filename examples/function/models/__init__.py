"""The models of this repository, which has a package of that name as many have."""
