package channel

import (
	"context"
	"log/slog"
	"net"
	"testing"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// An owner that alternates between the enrolment protocol and the ordinary one
// must not see its two carriers try different ones in one attempt.
func TestBothCarriersTryTheSameProtocol(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	asked := 0 // without a lock: the race detector looks on
	d := &Dialer{Addr: closed.Addr().String(), Peer: PeerDownstream, Identity: identitytest.NewCA(t).Party(t, wire.RoleGateway),
		Log: slog.New(slog.DiscardHandler), Enroll: func() bool { asked++; return asked%2 == 1 }}
	for attempt := 1; attempt <= 2; attempt++ {
		ctx, cancel := context.WithTimeout(t.Context(), 3*headStart)
		_, err := d.Dial(ctx)
		cancel()
		if err == nil {
			t.Fatal("a closed port answers")
		}
		if asked != attempt {
			t.Fatalf("after attempt %d, Enroll was asked %d times", attempt, asked)
		}
	}
}
