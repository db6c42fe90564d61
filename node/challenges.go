package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"sallyport/config"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
	"sallyport/node/policy"
)

const (
	// maxChallenges are looked at at once, each for challengeTime at most.
	maxChallenges = 16
	challengeTime = 30 * time.Second
)

// challengePorts are where challenges are answered (RFC 8555, 8.3; RFC 8737, 3).
var challengePorts = map[string]string{"http-01": "80", "tls-alpn-01": "443"}

// challenges lets a gateway see, from here, how hosts answer ACME challenges.
// Which hosts those may be says this host's configuration.
type challenges struct {
	rules  config.ChallengeRules
	closed func() (tunnel.Code, string)
	log    *slog.Logger
	slots  chan struct{}
	stray  *rate.Limiter // of the log
}

func newChallenges(rules config.ChallengeRules, closed func() (tunnel.Code, string), log *slog.Logger) *challenges {
	return &challenges{rules: rules, closed: closed, log: log, slots: make(chan struct{}, maxChallenges), stray: rate.NewLimiter(refusalsPerSecond, refusalsBurst)}
}

// serve joins one stream with a host.
func (c *challenges) serve(ctx context.Context, kind, host string, s *tunnel.Stream) {
	refuse := func(code tunnel.Code, why string) {
		s.Refuse(code, why)
		if c.stray.Allow() {
			c.log.Warn("ACME challenge refused", "kind", kind, "host", wire.Quotable(host), "reason", why)
		}
	}
	if code, why := c.closed(); code != 0 {
		refuse(code, why)
		return
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	default:
		refuse(tunnel.Overloaded, fmt.Sprintf("%d challenges are looked at", maxChallenges))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, challengeTime)
	defer cancel()
	conn, err := c.dial(ctx, kind, host)
	if err != nil {
		var r *refusedError
		code := tunnel.Unreachable
		if errors.As(err, &r) {
			code = r.code
		}
		refuse(code, err.Error())
		return
	}
	_, _, err = tunnel.Join(ctx, s, conn)
	c.log.Info("ACME challenge looked at", "kind", kind, "host", wire.Quotable(host), "reason", err)
}

// dial connects to where a host's challenges are answered.
func (c *challenges) dial(ctx context.Context, kind, host string) (net.Conn, error) {
	host = strings.ToLower(host)
	rule, ok := c.rules.Find(host)
	if !ok {
		return nil, refuse(tunnel.Forbidden, "SALLYPORT_NODE_CHALLENGES of this node does not hold %s", wire.Quotable(host))
	}
	addr := rule.Addr
	if addr == "" {
		addr = net.JoinHostPort(host, challengePorts[kind])
	}
	name, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	// The host was let through by its name. Of its addresses those of the link
	// and of clouds' metadata stay out of reach, unless they stand in the rule.
	reach := policy.Reach{Allow: config.HostPorts{{Host: "*", Port: port}}}
	if rule.Addr != "" || rule.Glob == host {
		reach.Allow = append(reach.Allow, config.HostPort{Host: name, Port: port})
	}
	dialled, cancel := context.WithTimeoutCause(ctx, targetDial, fmt.Errorf("not within %v", targetDial))
	defer cancel()
	conn, err := reach.Dial(dialled, wire.TargetSpec{Address: addr})
	if err != nil {
		return nil, dialError(dialled, addr, err)
	}
	return conn, nil
}
