"""Code that tests of several folders share. No test module imports another one."""
