-- +goose Up

-- Why a node is quarantined: two live hosts were seen with its identity. Empty:
-- it is not. It outlives restarts and ends by an operator's word.
ALTER TABLE nodes ADD COLUMN quarantine TEXT NOT NULL DEFAULT '';
