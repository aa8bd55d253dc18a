"""What a person looks at: pictures and the report of a run, one point chosen, runs compared. Only files are read."""
