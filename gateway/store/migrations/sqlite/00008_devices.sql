-- +goose Up

-- The device that vouched for the party of a request: the hash of its key, and
-- its certificates as a JSON list of DER. Empty: none did.
ALTER TABLE requests ADD COLUMN device_key TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN device_chain BLOB;

CREATE INDEX requests_device ON requests (device_key) WHERE device_key <> '';
