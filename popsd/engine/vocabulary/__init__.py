"""A vocabulary in shards: which rows of the head this rank holds, and how what it knows of a row becomes what all know."""
