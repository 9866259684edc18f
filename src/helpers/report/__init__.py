"""What a study found: records read into frames, and the tables, figures and claims made of them. Imports no torch."""
