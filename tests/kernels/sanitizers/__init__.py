"""The CPU kernels under sanitizers; see driver.cpp."""
