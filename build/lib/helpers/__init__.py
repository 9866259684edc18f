"""What two or more notebooks of the study share. Start reading at `notebooks/`; each module says who may call it."""
