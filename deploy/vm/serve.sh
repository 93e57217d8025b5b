#!/bin/sh
# Runs the command of one connection to a machine of test-vm.sh: a line for the shell. Answers with its
# output, a line with its exit code, and what it wrote to standard error.
errors=/tmp/errors.$$
read -r line
sh -c "$line" </dev/null 2>"$errors"
printf '\n::exit %s\n' $?
cat "$errors"
rm -f "$errors"
