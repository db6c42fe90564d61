package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sallyport/config"
	"sallyport/internal/wire"
)

const (
	targetsVariable = "SALLYPORT_NODE_ALLOW_TARGETS"
	// lookupTimeout bounds the look at a name while a policy is applied: the
	// verdict falls when it is dialled.
	lookupTimeout = 2 * time.Second
	// lookupPause follows one that timed out: a thousand targets must not wait
	// for a dead name server one after the other.
	lookupPause = 30 * time.Second
	// maxAddresses of one name are tried.
	maxAddresses = 16
)

// ErrNotAllowed says that the node's configuration keeps a target away.
var ErrNotAllowed = errors.New("refused by the node's configuration")

// Reach is where targets may lead. The name as it is written must be allowed,
// and so must be each address that is dialled: it is the very one that was
// checked, so that a name server that changes its mind leads nowhere.
type Reach struct {
	Allow config.HostPorts // SALLYPORT_NODE_ALLOW_TARGETS
	// Lookup resolves a name; nil: the system's resolver.
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)

	pause atomic.Int64 // unix nanoseconds until which check does not resolve
}

// Dial connects to the service of a target, within ctx. The name was resolved
// once, and only what the list allows of it is tried.
func (r *Reach) Dial(ctx context.Context, spec wire.TargetSpec) (*net.TCPConn, error) {
	addrs, err := r.resolve(ctx, spec.HostPort())
	if err != nil {
		return nil, err
	}
	var first error
	for i, addr := range addrs {
		c, err := dialOne(ctx, addr, len(addrs)-i)
		if err == nil {
			return c, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

// targetKeepAlive notices in minutes that a service is gone.
var targetKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// dialOne gives an address its share of the time that is left.
func dialOne(ctx context.Context, addr netip.AddrPort, left int) (*net.TCPConn, error) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
	}
	d := net.Dialer{KeepAliveConfig: targetKeepAlive}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", addr.String()) // DialTCP would bind a port of its own first, and run out of them
	if err != nil {
		return nil, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("dial %s: %T is no TCP connection", addr, c), c.Close())
	}
	return tcp, nil
}

// resolve returns what may be dialled of host:port, never nothing without an error.
func (r *Reach) resolve(ctx context.Context, hostPort string) ([]netip.AddrPort, error) {
	host, port, number, err := splitTarget(hostPort)
	if err != nil {
		return nil, err
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if err := r.allowAddr(a, number); err != nil {
			return nil, err
		}
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), number)}, nil
	}
	if !r.allowName(host, port) {
		return nil, notAllowed(net.JoinHostPort(host, port))
	}
	lookup := r.Lookup
	if lookup == nil {
		lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	found, err := lookup(ctx, host)
	if err != nil {
		return nil, err
	}
	var out []netip.AddrPort
	var refused error
	for _, a := range found[:min(len(found), maxAddresses)] {
		if err := r.allowAddr(a, number); err == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), number))
		} else if refused == nil {
			refused = fmt.Errorf("%s resolves to %s: %w", host, a.Unmap(), err)
		}
	}
	switch {
	case len(out) > 0:
		return out, nil
	case refused != nil:
		return nil, refused
	}
	return nil, fmt.Errorf("%s has no address", host)
}

func splitTarget(hostPort string) (host, port string, number uint16, err error) {
	host, port, err = net.SplitHostPort(hostPort)
	if err != nil {
		return "", "", 0, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return "", "", 0, fmt.Errorf("port %q: %w", port, err)
	}
	return strings.ToLower(strings.TrimSuffix(host, ".")), port, uint16(n), nil
}

func notAllowed(hostPort string) error {
	return fmt.Errorf("%w: %s does not allow %s; add it there on the node", ErrNotAllowed, targetsVariable, hostPort)
}

// allowName looks at a name as it is written.
func (r *Reach) allowName(host, port string) bool {
	for _, p := range r.Allow {
		if glob(p.Host, host) && glob(p.Port, port) {
			return true
		}
	}
	return false
}

// allowAddr decides about one address that would be dialled.
func (r *Reach) allowAddr(a netip.Addr, number uint16) error {
	a = a.Unmap()
	port := strconv.Itoa(int(number))
	shown := net.JoinHostPort(a.String(), port)
	if a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("%w: %s is the address of no single host", ErrNotAllowed, shown)
	}
	guarded := guardedAddr(a)
	for _, p := range r.Allow {
		if !glob(p.Port, port) {
			continue
		}
		if literal, ok := p.Addr(); ok {
			if literal == a || literal == a.WithZone("") {
				return nil
			}
			continue
		}
		if !guarded && glob(p.Host, a.String()) {
			return nil
		}
	}
	if guarded {
		return fmt.Errorf("%w: %s is a link-local or cloud metadata address, which %s must name literally (no pattern counts)", ErrNotAllowed, shown, targetsVariable)
	}
	return notAllowed(shown)
}

// metadata are addresses outside of the link-local ranges at which clouds hand
// out credentials to whoever asks from the host.
var metadata = []netip.Addr{
	netip.MustParseAddr("100.100.100.200"), // Alibaba Cloud
	netip.MustParseAddr("168.63.129.16"),   // Azure
	netip.MustParseAddr("192.0.0.192"),     // Oracle Cloud
	netip.MustParseAddr("fd00:ec2::254"),   // AWS instances
	netip.MustParseAddr("fd00:ec2::23"),    // AWS EKS pods
	netip.MustParseAddr("fd20:ce::254"),    // Google Cloud
	netip.MustParseAddr("fd00:42::42"),     // Scaleway
}

// translated are the prefixes whose last 32 bits are an IPv4 address that a
// gateway in the network dials: NAT64 (RFC 6052) and IPv4-compatible (RFC 4291).
var translated = []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("::/96")}

// guardedAddr tells an address that no pattern opens.
func guardedAddr(a netip.Addr) bool {
	a = a.WithZone("")
	for _, p := range translated {
		if p.Contains(a) && !a.IsLoopback() {
			b := a.As16()
			a = netip.AddrFrom4([4]byte(b[12:]))
		}
	}
	if a.IsLinkLocalUnicast() {
		return true
	}
	for _, m := range metadata {
		if a == m {
			return true
		}
	}
	return false
}

// glob matches "*" with any text and "?" with one character.
func glob(pattern, s string) bool {
	star, mark := -1, 0 // place behind the last star, and of the text it began to swallow
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			p++
			star, mark = p, i
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// check tells, while a policy is applied, whether its target can ever be
// dialled. A name that does not resolve now may do so later.
func (r *Reach) check(ctx context.Context, spec wire.TargetSpec) error {
	host, port, _, err := splitTarget(spec.HostPort())
	if err != nil {
		return err
	}
	if _, err := netip.ParseAddr(host); err != nil && r.allowName(host, port) && time.Now().UnixNano() < r.pause.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	_, err = r.resolve(ctx, spec.HostPort())
	if ctx.Err() != nil {
		r.pause.Store(time.Now().Add(lookupPause).UnixNano())
	}
	if errors.Is(err, ErrNotAllowed) {
		return err
	}
	return nil
}

// applyTarget changes nothing on the host: a target that is applied is one
// that [Engine.Target] finds.
func (e *Engine) applyTarget(ctx context.Context, p wire.Policy, raw json.RawMessage) error {
	var spec wire.TargetSpec
	if err := strictJSON(raw, &spec); err != nil {
		return err
	}
	if wire.IsBuiltinTarget(p.Name) {
		return fmt.Errorf("every node has a target %s of its own; choose another name", p.Name)
	}
	if err := spec.Validate(); err != nil {
		return err
	}
	return e.cfg.Reach.check(ctx, spec)
}

// ErrGone ends what uses a target whose policy was removed or changed.
var ErrGone = errors.New("the target's policy was removed or changed")

// offer is one applied target in use.
type offer struct {
	spec wire.TargetSpec
	ctx  context.Context
	gone context.CancelCauseFunc
}

// Target returns the applied target of a name. It holds until ctx is done,
// with the cause [ErrGone].
func (e *Engine) Target(name string) (spec wire.TargetSpec, ctx context.Context, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if o, ok := e.offers[name]; ok { // every connection asks
		return o.spec, o.ctx, true
	}
	a, ok := e.applied[name]
	if !ok || a.Type != wire.PolicyTarget || json.Unmarshal(a.Spec, &spec) != nil {
		return wire.TargetSpec{}, nil, false
	}
	o := offer{spec: spec}
	o.ctx, o.gone = context.WithCancelCause(context.Background())
	e.offers[name] = o
	return spec, o.ctx, true
}

// dropOfferLocked ends what uses the target of a name.
func (e *Engine) dropOfferLocked(name string) {
	if o, ok := e.offers[name]; ok {
		o.gone(ErrGone)
		delete(e.offers, name)
	}
}
