"""The command line: compose, decode, check, call one function, exit with a code that job scripts act on."""
