-- +goose Up

-- Leaves that were issued, by the serial number that CRLs and OCSP name them
-- by. issuer is the key hash of the intermediate. door is empty for those of
-- our own parties: whether they are revoked says keys.
CREATE TABLE certificates (
    issuer      TEXT      NOT NULL,
    serial      TEXT      NOT NULL,
    door        TEXT      NOT NULL,
    key_hash    TEXT      NOT NULL,
    names       TEXT      NOT NULL,
    via         TEXT      NOT NULL,
    issued_at   TIMESTAMP NOT NULL,
    not_after   TIMESTAMP NOT NULL,
    revoked_at  TIMESTAMP,
    reason      INTEGER   NOT NULL,
    PRIMARY KEY (issuer, serial)
);
CREATE INDEX certificates_key ON certificates (key_hash);
CREATE INDEX certificates_end ON certificates (not_after);
CREATE INDEX certificates_revoked ON certificates (revoked_at) WHERE revoked_at IS NOT NULL;

-- What the ACME door keeps of its clients: accounts, orders, challenges. All of
-- it is made anew by clients that find it gone.
CREATE TABLE door_values (
    bucket      TEXT      NOT NULL,
    name        TEXT      NOT NULL,
    value       BLOB      NOT NULL,
    changed_at  TIMESTAMP NOT NULL,
    PRIMARY KEY (bucket, name)
);
CREATE INDEX door_values_age ON door_values (bucket, changed_at);
