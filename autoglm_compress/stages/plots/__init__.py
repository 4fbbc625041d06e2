"""The plots of stages' decisions, one file each. Records of older versions can be drawn too."""
