"""What each operator computes, in plain torch and in any precision: the yardstick of its tests."""
