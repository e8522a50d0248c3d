"""The images: the data sets, how their files are found, downloaded or rendered, and how they are split."""
