package channel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// A closed port is known as one soon, although QUIC never hears of it.
func TestRefusedTCPLeavesQUICLittleTime(t *testing.T) {
	silent := func(ctx context.Context) (*Conn, error) {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(8 * time.Second): // as long as QUIC tries
			return nil, errors.New("no answer")
		}
	}
	fails := func(err error) func(context.Context) (*Conn, error) {
		return func(context.Context) (*Conn, error) { return nil, err }
	}
	refused := fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED})
	for _, c := range []struct {
		name   string
		h3, h2 func(context.Context) (*Conn, error)
		want   time.Duration
		err    error
	}{
		{"both closed", silent, fails(refused), headStart + lateQUIC, errNobody},
		{"TCP fails otherwise", silent, fails(syscall.ENETUNREACH), 8 * time.Second, syscall.ENETUNREACH},
		{"both fail at once", fails(errors.New("no")), fails(refused), 0, syscall.ECONNREFUSED},
		{"QUIC answers late", func(ctx context.Context) (*Conn, error) {
			time.Sleep(lateQUIC)
			return &Conn{}, ctx.Err()
		}, fails(refused), lateQUIC, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				conn, err := raceOf(t.Context(), c.h3, c.h2)
				if took := time.Since(began); took != c.want || !errors.Is(err, c.err) || (c.err == nil) != (conn != nil) {
					t.Fatalf("%v after %v, want %v after %v", err, took, c.err, c.want)
				}
			})
		})
	}
}

func TestClosedPortIsKnownSoon(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	d := &Dialer{Addr: addr, Peer: PeerUpstream, Identity: identitytest.NewCA(t).Party(t, wire.RoleNode), Log: slog.New(slog.DiscardHandler)}
	began := time.Now()
	_, err = d.Dial(t.Context())
	if took := time.Since(began); !errors.Is(err, syscall.ECONNREFUSED) || took > headStart+lateQUIC+5*time.Second {
		t.Fatalf("%v after %v", err, took)
	}
}
