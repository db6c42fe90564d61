package wire

import (
	"strings"
	"time"
)

// PathReign of the session API of an RCP: PUT Envelope of Reign → the newest
// Envelope of that installation that the RCP holds; GET + installation.
const PathReign = "/v1/reigns/"

// TypeReign is the type of a signed [Reign].
const TypeReign = "sallyport/reign/1"

// Reign says which state of an installation is the one that goes on. A backup
// that is restored begins a new one; a gateway that still runs from an older
// state stops when it is shown a newer one. It is signed by the gateway: an
// RCP, which keeps the newest, can withhold it, and cannot make one up.
type Reign struct {
	TrustDomain  string    `json:"trust_domain"`
	Installation string    `json:"installation"`
	Generation   int64     `json:"generation"`
	RestoredAt   time.Time `json:"restored_at"` // zero: it was never restored
	Name         string    `json:"name"`        // random, made with the restoration
	Gateway      ID        `json:"gateway"`     // who signed
	Issued       time.Time `json:"issued"`
}

// Mark is the part that a hello carries.
func (r Reign) Mark() ReignMark {
	return ReignMark{Installation: r.Installation, Generation: r.Generation, RestoredAt: r.RestoredAt, Name: r.Name, Issued: r.Issued}
}

// After orders the reigns of one installation. Of two restorations of one
// backup the later counts; their names decide only where clocks do not.
func (r Reign) After(o Reign) bool { return r.Mark().After(o.Mark()) }

// ReignMark is what an RCP says of a [Reign] that it holds.
type ReignMark struct {
	Installation string    `json:"installation"`
	Generation   int64     `json:"generation"`
	RestoredAt   time.Time `json:"restored_at"`
	Name         string    `json:"name"`
	Issued       time.Time `json:"issued"`
}

// After is [Reign.After].
func (m ReignMark) After(o ReignMark) bool {
	if m.Generation != o.Generation {
		return m.Generation > o.Generation
	}
	if !m.RestoredAt.Equal(o.RestoredAt) {
		return m.RestoredAt.After(o.RestoredAt)
	}
	return strings.Compare(m.Name, o.Name) > 0
}

// Same tells whether both are of one reign, whenever they were signed.
func (m ReignMark) Same(o ReignMark) bool { return !m.After(o) && !o.After(m) }
