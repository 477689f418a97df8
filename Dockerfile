# syntax=docker/dockerfile:1
#
#   docker build --tag rowcache .
#   docker run --rm --env DATABASE_URL rowcache doctor

# The Debian of both stages is the same one: a program that was linked to a newer glibc than the second stage has does not start.
FROM rust:1-slim-bookworm AS builder
WORKDIR /src
COPY . .
# The caches outlive the layer: a changed line compiles this crate, and not all dependencies again. The target directory is one of
# them, so the program is copied out of it.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --features serve --bin rowcache \
    && install -D --strip target/release/rowcache /out/rowcache

# glibc, libgcc and certificates; no shell, no package manager, and a user that is not root.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="rowcache" \
      org.opencontainers.image.description="Postgres rows, cached in each service's process and kept coherent by triggers and LISTEN/NOTIFY" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY --from=builder /out/rowcache /usr/local/bin/rowcache
EXPOSE 8080
# No HEALTHCHECK: there is no curl in here to ask with, and the orchestrator asks better: GET /healthz whether to restart the
# container (it says 200 while the process lives), GET /readyz whether to send requests (it says 503, and why, while it should get none).
ENTRYPOINT ["/usr/local/bin/rowcache"]
# Listens on 127.0.0.1 unless told otherwise, so this alone serves nobody outside the container: see docs/operations.md.
CMD ["serve"]
