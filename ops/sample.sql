-- The table that docker-compose.yml serves. Postgres runs this once, when it makes the database.

create table public.users (
    id bigint primary key,
    name text not null,
    email text not null unique,
    -- Never served: ops/rowcache.toml excludes it.
    password_hash text not null
);

insert into public.users
select id, 'user ' || id, 'user' || id || '@example.com', md5(id::text)
from generate_series(1, 10000) as id;
