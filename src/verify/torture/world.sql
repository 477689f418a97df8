-- The tables of a torture run. Keys of all of them are different numbers, so that a key names a row of one table.

create schema torture;

create table torture.item (key bigint primary key, number bigint not null, pad text not null default '');
create table torture.secret (key bigint primary key, number bigint not null, pad text not null default '');
create table torture.lone (key bigint primary key, number bigint not null, pad text not null default '');

-- One row for each changed row, written by the transaction that changed it: what was lost in a crash lost this as well.
create table torture.history (key bigint not null, number bigint not null, deletes boolean not null, xid bigint not null);
