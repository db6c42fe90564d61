package wire

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
)

// MaxLaneBody bounds the body of POST /v1/lanes, in bytes.
const MaxLaneBody = 2 << 10

// Ticket opens one leg of a lane, once: 256 random bits that whoever dialled a
// channel presents in a connection of its own. It does not print itself.
type Ticket [32]byte

// NewTicket makes a ticket.
func NewTicket() (t Ticket) {
	_, _ = rand.Read(t[:]) // never fails: crypto/rand ends the program instead
	return t
}

// MarshalText gives the unpadded base64url form.
func (t Ticket) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, t[:]), nil
}

// UnmarshalText accepts exactly what MarshalText writes, but not the zero ticket.
func (t *Ticket) UnmarshalText(b []byte) error {
	var got Ticket
	if base64.RawURLEncoding.DecodedLen(len(b)) != len(got) {
		return fmt.Errorf("a ticket has %d bytes", len(got))
	}
	if n, err := base64.RawURLEncoding.Strict().Decode(got[:], b); err != nil || n != len(got) { // it skips line ends
		return errors.New("a ticket is written in base64url")
	}
	if got == (Ticket{}) {
		return errors.New("the ticket is zero")
	}
	*t = got
	return nil
}

func (Ticket) String() string { return "ticket" }

// GoString is for %#v.
func (Ticket) GoString() string { return "wire.Ticket{}" }

// LaneRequest asks a downstream peer for its leg of a lane, with POST
// /v1/lanes: one who was dialled expects the ticket on its port, one who
// dialled presents it at the address that its channel goes to. The request
// carries no address. 200 says that this was done, by all further down too.
type LaneRequest struct {
	Ticket Ticket `json:"ticket"`
	// Sealed asks for legs inside TLS, for where bare ones may not be or cannot.
	// Who knows of them answers with HeaderLane: LaneSealed.
	Sealed bool `json:"sealed,omitempty"`

	// To an RCP only: whom the lane leads to, and as with CONNECT the RCPs
	// that may still be passed, this one included (0: MaxHops), and those
	// that were passed.
	Node ID   `json:"node,omitempty"`
	Hops int  `json:"hops,omitempty"`
	Via  []ID `json:"via,omitempty"`
}

// Validate refuses what no honest peer sends.
func (r LaneRequest) Validate() error {
	switch {
	case r.Ticket == (Ticket{}):
		return errors.New("no ticket")
	case r.Hops < 0 || r.Hops > MaxHops:
		return fmt.Errorf("%d hops, want 0 to %d", r.Hops, MaxHops)
	case len(r.Via) > MaxHops:
		return fmt.Errorf("more than %d RCPs were passed", MaxHops)
	}
	if r.Node != "" {
		if _, err := ParseID(string(r.Node)); err != nil {
			return err
		}
	}
	for _, id := range r.Via {
		if _, err := ParseID(string(id)); err != nil {
			return err
		}
	}
	return nil
}
