-- Takes back what nodes ask. Nodes that still run read Postgres directly from now on.
--
-- Locks: none on tables of yours.

drop function if exists rowcache.schema_version();
drop function if exists rowcache.describe(text);
drop function if exists rowcache.described(regclass, text);
drop function if exists rowcache.fingerprints(text[]);
drop function if exists rowcache.enums(regclass);
