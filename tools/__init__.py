"""Scripts of the project: records, tuning, sanitizer. Not part of the package."""
