"""A sparse model on disk: the compressed file, and files of other libraries."""
