package store

import (
	"context"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

// SetQuarantine puts a node into quarantine, or, without a reason, ends it.
func (tx *Tx) SetQuarantine(ctx context.Context, id wire.ID, why string) error {
	tx.Wake(bus.Nodes)
	return one(tx.q.NewRaw("UPDATE nodes SET quarantine = ? WHERE id = ? AND removed_at IS NULL", why, id).Exec(ctx))
}
