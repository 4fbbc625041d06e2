"""The plots that stages draw of what they decided, a file for each; records of older versions can be drawn too."""
