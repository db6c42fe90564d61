package store

import (
	"path/filepath"
	"testing"

	"sallyport/internal/wire"
)

// A command on the gateway's host writes into the log of a database that the
// gateway has open, and positions go on from there.
func TestAuditBeside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sallyport.db")
	db := open(t, path)
	if err := AuditBeside(t.Context(), path, "backup.create", "/there", ResultOK, ""); err != nil {
		t.Fatal(err)
	}
	update(t, db, func(tx *Tx) error {
		tx.Audit(t.Context(), "node.drain", string(wire.NewID()), "")
		return nil
	})
	log := must[[]AuditEntry](t)(db.AuditLog(t.Context(), AuditFilter{Limit: 10}))
	if len(log) != 2 || log[1].What != "backup.create" || log[0].What != "node.drain" || log[0].Pos <= log[1].Pos {
		t.Errorf("%+v", log)
	}
}
