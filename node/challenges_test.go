package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"sallyport/config"
	"sallyport/internal/tunnel"
)

// A gateway sees through this node the hosts that its configuration names, and
// not what a host's name may lead to.
func TestChallengesAreBounded(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	var rules config.ChallengeRules
	if err := rules.UnmarshalText([]byte("web.example=" + ln.Addr().String() + ";*.wide.example;169.*;fd00*")); err != nil {
		t.Fatal(err)
	}
	c := newChallenges(rules, func() (tunnel.Code, string) { return 0, "" }, slog.New(slog.DiscardHandler))
	for host, want := range map[string]tunnel.Code{
		"web.example":            0,
		"WEB.example":            0,
		"other.example":          tunnel.Forbidden,
		"web.example.org":        tunnel.Forbidden,
		"":                       tunnel.Forbidden,
		"169.254.169.254":        tunnel.Forbidden, // a pattern does not reach a cloud's credentials
		"fd00:ec2::254":          tunnel.Forbidden,
		"nowhere.wide.example":   tunnel.Unreachable,
		"x\ny.wide.example":      tunnel.Unreachable,
		"127.0.0.1:22":           tunnel.Forbidden,
		"web.example:1234":       tunnel.Forbidden,
		"http://web.example/x?y": tunnel.Forbidden,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		conn, err := c.dial(ctx, "http-01", host)
		cancel()
		var code tunnel.Code
		var r *refusedError
		if errors.As(err, &r) {
			code = r.code
		} else if err != nil {
			t.Errorf("%q: %v has no code", host, err)
		}
		if conn != nil {
			_ = conn.Close()
		}
		if code != want && (want != tunnel.Unreachable || code != tunnel.Timeout) {
			t.Errorf("%q: %v (%v), want %v", host, code, err, want)
		}
	}
}
