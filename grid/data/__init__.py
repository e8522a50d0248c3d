"""The images: which data sets there are, how their files are found or made, and how they are split."""
