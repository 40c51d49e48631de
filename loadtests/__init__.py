"""Load tests; they speak HTTP only and import nothing of the other packages."""
