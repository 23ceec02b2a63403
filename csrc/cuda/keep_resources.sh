#!/bin/sh
# Runs a compiler command and keeps what it says, with ptxas' report of registers, stack and spills of each kernel, in
# build/cuda-resources: make cuda-build reads these files.
object=
previous=
for argument in "$@"; do
    if [ "$previous" = -o ]; then
        object=$argument
    fi
    previous=$argument
done
case $object in
    *.cu.o) ;;
    *) exec "$@" ;;
esac
report=$(cd "$(dirname "$0")/../.." && pwd)/build/cuda-resources/$(basename "$object" .cu.o).txt
mkdir -p "$(dirname "$report")"
"$@" > "$report" 2>&1
status=$?
if [ $status -ne 0 ]; then
    cat "$report" >&2
    rm -f "$report"
fi
exit $status
