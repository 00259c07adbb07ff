#!/bin/sh
# Serves one request of the host; its first line says which.
#   run LENGTH TOKEN   then a script of LENGTH bytes: output, then a line with TOKEN and the status
#   put LENGTH TOKEN PATH   then the content: a line with TOKEN and the status
read -r verb length token path
case $verb in
run)
    script=/run/drbdrs/script.$$
    head -c "$length" >"$script"
    sh "$script" </dev/null 2>&1
    status=$?
    rm -f "$script"
    ;;
put)
    mkdir -p "${path%/*}/" && head -c "$length" >"$path" && [ "$(stat -c %s "$path")" = "$length" ]
    status=$?
    ;;
*)
    status=127
    ;;
esac
printf '\n%s %s\n' "$token" "$status"
