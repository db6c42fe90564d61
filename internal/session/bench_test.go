package session_test

import (
	"context"
	"io"
	"net/http"
	"testing"

	"sallyport/internal/channel"
	"sallyport/internal/channel/channeltest"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/session"
	"sallyport/internal/wire"
)

// BenchmarkDial opens a session through a channel, asks once and closes it:
// with a full handshake every time, and resumed. Both ends are in this process.
func BenchmarkDial(b *testing.B) {
	for _, resume := range []bool{false, true} {
		name := "full"
		if resume {
			name = "resumed"
		}
		b.Run(name, func(b *testing.B) {
			ca := identitytest.NewCA(b)
			gateway, node := ca.Party(b, wire.RoleGateway), ca.Party(b, wire.RoleNode)
			up, down := channeltest.PairTCP(b, gateway, node, false)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			go func() {
				_ = down.Serve(ctx, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if stream, err := channel.AcceptConnect(w, r); err == nil {
						_ = session.Serve(r.Context(), stream, node, http.HandlerFunc(whatIsAsked))
					}
				}))
			}()
			peer, _ := node.Party()
			full := 0
			b.ReportAllocs()
			for b.Loop() {
				if !resume {
					b.StopTimer()
					ca.Certify(b, gateway) // a new leaf has no tickets
					b.StartTimer()
				}
				stream, err := up.Connect(ctx, wire.ConnectAuthority(node.ID()), nil)
				if err != nil {
					b.Fatal(err)
				}
				s, err := session.Dial(ctx, stream, gateway, peer)
				if err != nil {
					b.Fatal(err)
				}
				if !s.Resumed() {
					full++
				}
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://peer/v1/hello", nil)
				if err != nil {
					b.Fatal(err)
				}
				res, err := s.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				_ = s.Close()
			}
			if resume && full > 1 {
				b.Errorf("%d of %d sessions were not resumed", full, b.N)
			}
		})
	}
}
