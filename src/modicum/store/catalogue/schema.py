"""The tables of the catalogue. Numbers are given out by the catalogue itself: a change is alone in the store."""

from __future__ import annotations

#: `names.name` is NULL after a purge, then `pseudonym` is what the audit log knows the name by
TABLES = """
CREATE TABLE names(
    id INTEGER PRIMARY KEY, name TEXT UNIQUE, latest INTEGER NOT NULL, salt BLOB, pseudonym BLOB);
CREATE TABLE kinds(
    id INTEGER PRIMARY KEY, method TEXT NOT NULL, dtype TEXT NOT NULL, task TEXT, base TEXT, basis TEXT,
    digest BLOB NOT NULL);
CREATE TABLE versions(
    name INTEGER NOT NULL, version INTEGER NOT NULL, object INTEGER NOT NULL, kind INTEGER NOT NULL,
    size INTEGER NOT NULL, entry INTEGER NOT NULL, PRIMARY KEY(name, version)) WITHOUT ROWID;
CREATE TABLE aliases(
    name INTEGER NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY(name, alias)) WITHOUT ROWID;
CREATE TABLE earlier(
    name INTEGER NOT NULL, alias TEXT NOT NULL, depth INTEGER NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY(name, alias, depth)) WITHOUT ROWID;
CREATE TABLE tags(
    tag TEXT NOT NULL, name INTEGER NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY(tag, name, version)) WITHOUT ROWID;
CREATE INDEX tags_of ON tags(name, version);
CREATE TABLE metrics(
    name INTEGER NOT NULL, version INTEGER NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY(name, version, metric)) WITHOUT ROWID;
CREATE TABLE notes(
    name INTEGER NOT NULL, version INTEGER NOT NULL, note TEXT NOT NULL,
    PRIMARY KEY(name, version)) WITHOUT ROWID;
CREATE TABLE actors(id INTEGER PRIMARY KEY, actor TEXT NOT NULL UNIQUE);
CREATE TABLE audit(
    seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, actor INTEGER NOT NULL, action TEXT NOT NULL,
    name INTEGER, version INTEGER, digest BLOB, detail TEXT, content BLOB, hash BLOB NOT NULL);
CREATE INDEX audit_of ON audit(name);
"""
