"""What two or more notebooks of the study share. Start reading at `notebooks/`; the first lines of each module say what it is for."""
