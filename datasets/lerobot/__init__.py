"""LeRobot datasets v2.0 to v3.0, read and written without LeRobot."""
