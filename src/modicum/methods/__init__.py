"""One file per method; the file name is the method name. See CONTRIBUTING for how to add one."""
