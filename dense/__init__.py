"""Code that segmentation and detection share."""
