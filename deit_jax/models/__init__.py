"""Vision transformers, RegNetY teachers and the table of their names (`registry`)."""
