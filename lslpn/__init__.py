"""Few-shot segmentation of organs by location-sensitive local prototypes."""
