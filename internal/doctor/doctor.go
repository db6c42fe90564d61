// Package doctor looks at what a role keeps on its host, without the role: a
// damaged identity is the reason why it does not start. It reads and changes
// nothing. Each finding says what to do.
package doctor

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/local"
	"sallyport/internal/wire"
)

const (
	// maxFile bounds what is read: a revocation set is the largest.
	maxFile = 32 << 20
	// reachTime bounds an attempt to reach an address.
	reachTime = 3 * time.Second
	// early is how far the newest signed document may be ahead of our clock.
	early = 5 * time.Minute
)

const (
	fixForeign   = "that is the RCP or gateway of another installation: correct the address"
	fixName      = "the name is not known here: correct it, or ask for another resolver (/etc/resolv.conf); an IP address works too"
	fixRefused   = "the host is there and nothing listens on that port: see whether the role runs there, and whether it is the right port"
	fixRoute     = "there is no route to it: see the routes of this host, or set HTTPS_PROXY if the way out is a proxy"
	fixAuthority = "one side does not know the other's CA: is it the right gateway or RCP? If the gateway was installed anew, enrol again with a new join code"
	fixRefusedUs = "something answers there, and does not accept this certificate: if `sallyport revocation list` on the gateway has its key, a new join code enrols this host again; else compare the clocks, and see whether it is the right address"
	fixService   = "something answers there that takes no channel of ours: see whether it is the right port (an RCP listens on 9090 by default, a gateway's API on 8443), and whether its *_LISTEN admits this side (@upstream, @downstream)"
	fixProxy     = "the proxy itself is not reached: correct HTTPS_PROXY, or name this address in NO_PROXY if no proxy leads there"
	fixProxyNo   = "the proxy answers, and does not let us through: see whether it allows CONNECT to that address and port and reaches it; or name the address in NO_PROXY if no proxy leads there"
	fixProxyOdd  = "what answers there speaks no HTTP, or not with us: see whether HTTPS_PROXY names the port of an HTTP proxy (https:// where that wants TLS), and whether it works"
	fixProxyURL  = "correct HTTPS_PROXY in the role's environment; until then nothing is dialled that it is for"
	fixProxyTLS  = "; an HTTP proxy is on the way: if it opens TLS connections to look into them, or lets none through that is not HTTPS, have it leave this address alone"
	fixFirewall  = "see whether a firewall between here and there lets TCP and UDP pass to that port, and whether it is the right address"
	fixUntrusted = "the other side's certificate is of another CA: is it the right gateway or RCP? If the gateway was installed anew, enrol again with a new join code"
	fixWaits     = "it waits for its own certificate, or is not the right RCP: `sallyport rcp list` and `sallyport request list` on the gateway say which"
	fixProxyUser = "put the user and the password that the proxy wants into HTTPS_PROXY (http://user:password@host:port)"
	fixProxyQUIC = "QUIC does not pass HTTP proxies: set the carrier to auto or h2 (SALLYPORT_NODE_CARRIER, SALLYPORT_RCP_CARRIER, SALLYPORT_GATEWAY_CARRIER), or name the address in NO_PROXY if no proxy leads there"
	fixClock     = "set the clock of this host (chronyc tracking, timedatectl): certificates are good up to 72 hours before their issue, and no earlier"
)

// patient is one identity directory.
type patient struct {
	dir  string
	role wire.Role
	now  time.Time

	chain, roots []*x509.Certificate
	checks       []local.Check
}

func (p *patient) bad(check, detail, fix string) {
	p.checks = append(p.checks, local.Check{Check: check, Detail: detail, Fix: fix})
}

func (p *patient) good(check, detail string) {
	p.checks = append(p.checks, local.Check{Check: check, OK: true, Detail: detail})
}

// enrol is what to do about an identity that is lost.
func (p *patient) enrol() string {
	const aside = "restore the directory from a backup, or stop the role, set its identity aside (`sallyport local rejoin`), and enrol again with a new join code "
	switch p.role {
	case wire.RoleGateway:
		return "restore the gateway from a backup (`sallyport restore FILE`); or stop it and move " + p.dir + " away: its certificate authority makes it a new identity when it starts"
	case wire.RoleRCP:
		return aside + "(`sallyport rcp join NAME --replace`)"
	}
	return aside + "(`sallyport join create --name NAME --replace`)"
}

// Identity examines the files of an identity.
func Identity(dir string, role wire.Role, now time.Time) []local.Check {
	p := &patient{dir: dir, role: role, now: now}
	if _, err := os.ReadDir(dir); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			p.bad("identity", dir+" does not exist: this "+string(role)+" was never started here", "set SALLYPORT_DATA to the directory of the role, or start it with a join code")
		} else {
			p.bad("identity", err.Error(), "run as the user that owns "+dir+", or as root")
		}
		return p.checks
	}
	if _, err := os.Stat(filepath.Join(dir, "chain.pem")); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, "key.pem")); errors.Is(err, fs.ErrNotExist) {
			p.bad("identity", "there is neither a key nor a certificate in "+dir+": this "+string(role)+" has not come so far, or all of it was lost",
				"start it: it makes a key, and its log says what stands in the way; where it was enrolled before, "+p.enrol())
			return p.checks
		}
	}
	p.key()
	p.certificates()
	p.clock()
	return p.checks
}

// read returns nil for a file that is not there.
func (p *patient) read(name string) ([]byte, error) {
	st, err := os.Stat(filepath.Join(p.dir, name))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case st.Size() > maxFile:
		return nil, fmt.Errorf("%s has %d bytes", name, st.Size())
	}
	return os.ReadFile(filepath.Join(p.dir, name))
}

func (p *patient) key() {
	const name = "key.pem"
	b, err := p.read(name)
	switch {
	case err != nil:
		p.bad("key", err.Error(), "run as the user that owns "+p.dir+", or as root")
		return
	case b == nil:
		p.bad("key", "there is no "+name+" in "+p.dir, p.enrol())
		return
	}
	if _, err := parseKey(b); err != nil {
		p.bad("key", name+" is corrupt: "+err.Error(), p.enrol())
		return
	}
	if mode, exposed := identity.Exposed(filepath.Join(p.dir, name)); exposed {
		p.bad("key", fmt.Sprintf("%s can be read by others (mode %04o)", name, mode), "`chmod 600 "+filepath.Join(p.dir, name)+"`; if somebody may have read it, renew the identity: it is what proves who this host is")
		return
	}
	p.good("key", name+" is there, and nobody else reads it")
}

func parseKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("it is not a PEM file")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("it holds a %T", k)
	}
	return key, nil
}

func parseCerts(b []byte) (out []*x509.Certificate, err error) {
	block, rest := pem.Decode(b)
	for ; block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	switch {
	case len(out) == 0:
		return nil, errors.New("it holds no certificate")
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("it was cut off, or holds more than certificates")
	}
	return out, nil
}

func (p *patient) certificates() {
	chainPEM, err := p.read("chain.pem")
	if err != nil {
		p.bad("certificate", err.Error(), "run as the user that owns "+p.dir+", or as root")
		return
	}
	rootPEM, err := p.read("root.pem")
	if err != nil {
		p.bad("trust", err.Error(), "run as the user that owns "+p.dir+", or as root")
		return
	}
	if chainPEM == nil {
		fix := "on the gateway: `sallyport request list` shows the request if it arrived; a new join code is taken without a restart"
		if p.role == wire.RoleGateway {
			fix = "start the gateway: it asks its certificate authority"
		}
		p.bad("certificate", "there is none yet (no chain.pem)", fix)
		return
	}
	if p.chain, err = parseCerts(chainPEM); err != nil {
		p.bad("certificate", "chain.pem is corrupt: "+err.Error(), p.enrol())
		return
	}
	if rootPEM == nil {
		p.bad("trust", "root.pem is missing: nobody can be verified", p.enrol())
		return
	}
	if p.roots, err = parseCerts(rootPEM); err != nil {
		p.bad("trust", "root.pem is corrupt: "+err.Error(), p.enrol())
		return
	}
	leaf := p.chain[0]
	keyPEM, _ := p.read("key.pem")
	next, _ := p.read("key-next.pem")
	fits, whole := false, false // a key that is missing or corrupt is another finding
	for _, b := range [][]byte{keyPEM, next} {
		if key, err := parseKey(b); err == nil {
			fits, whole = fits || key.PublicKey.Equal(leaf.PublicKey), true
		}
	}
	if !fits && whole {
		p.bad("certificate", "chain.pem does not belong to key.pem: files of two identities are mixed", p.enrol())
		return
	}
	p.names(leaf)
	p.trust()
}

// names compares who the certificate says this is with what the files say.
func (p *patient) names(leaf *x509.Certificate) {
	if len(leaf.URIs) != 1 {
		p.bad("name", "the certificate names no party (SPIFFE ID)", p.enrol())
		return
	}
	party, err := wire.ParsePartyURI(leaf.URIs[0])
	switch {
	case err != nil:
		p.bad("name", err.Error(), p.enrol())
		return
	case party.Role != p.role:
		p.bad("name", fmt.Sprintf("the certificate is for a %s, this is a %s", party.Role, p.role), "give each role its own SALLYPORT_DATA, and this one its own identity: "+p.enrol())
		return
	}
	if b, err := p.read("id"); err == nil && b != nil && strings.TrimSpace(string(b)) != string(party.ID) {
		p.bad("name", fmt.Sprintf("the file id says %s, the certificate says %s", wire.Quotable(strings.TrimSpace(string(b))), party.ID), "delete the file id: it is made again from the certificate")
		return
	}
	var pinned struct {
		TrustDomain string `json:"trust_domain"`
	}
	if b, err := p.read("pin.json"); err == nil && b != nil {
		if err := json.Unmarshal(b, &pinned); err != nil {
			p.bad("trust", "pin.json is corrupt: "+err.Error(), "delete it; a join code brings another")
			return
		}
		if pinned.TrustDomain != "" && pinned.TrustDomain != party.TrustDomain {
			p.bad("name", fmt.Sprintf("the certificate belongs to %s, the join code pinned %s: it is of another gateway", party.TrustDomain, wire.Quotable(pinned.TrustDomain)), p.enrol())
			return
		}
	}
	p.good("name", party.String()+" of "+party.TrustDomain)
	if b, err := p.read("trust.json"); err == nil && b != nil {
		if err := identity.CheckTrust(b, party.TrustDomain); err != nil {
			p.bad("trust", "trust.json is corrupt: "+err.Error(), p.enrol())
		}
	}
}

// trust verifies the chain up to a root that is trusted here. The time is one
// at which the leaf was good: whether it is now is another finding.
func (p *patient) trust() {
	leaf := p.chain[0]
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: leaf.NotAfter.Add(-time.Minute), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	for _, r := range p.roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range p.chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		p.bad("trust", "the certificate was not issued by the root in root.pem, but by another CA: "+err.Error(), p.enrol())
		return
	}
	p.good("trust", "the chain leads to root "+wire.KeyOf(p.roots[0]).Fingerprint())
}

// clock finds a clock that cannot be right, and a leaf that has ended.
func (p *patient) clock() {
	if b, err := p.read("revocations.json"); err == nil && b != nil {
		var env wire.Envelope
		var set wire.Revocations
		if json.Unmarshal(b, &env) != nil || json.Unmarshal(env.Payload, &set) != nil {
			p.bad("revocations", "revocations.json is corrupt", "delete it; the next upstream brings the current set")
		} else if set.Issued.After(p.now.Add(early)) {
			p.bad("clock", fmt.Sprintf("it says %s, and the newest revocation set was signed at %s: it is behind", p.now.UTC().Format(time.RFC3339), set.Issued.UTC().Format(time.RFC3339)), fixClock)
			return
		}
	}
	if len(p.chain) == 0 {
		return
	}
	leaf := p.chain[0]
	switch {
	case p.now.Before(leaf.NotBefore):
		p.bad("clock", fmt.Sprintf("it says %s, and the certificate is good from %s on: it is behind", p.now.UTC().Format(time.RFC3339), leaf.NotBefore.UTC().Format(time.RFC3339)), fixClock)
	case p.now.After(leaf.NotAfter):
		fix := "if the clock is right, let the gateway reach this " + string(p.role) + ": it renews an expired certificate with the same key, within its grace (after that: `sallyport local rejoin` and a new join code); if the clock is wrong: " + fixClock
		if p.role == wire.RoleGateway {
			fix = "if the clock is right, start the gateway: it asks its certificate authority; if not: " + fixClock
		}
		p.bad("clock", fmt.Sprintf("it says %s, and the certificate ended at %s", p.now.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339)), fix)
	default:
		p.good("clock", "within the life of the certificate, which ends "+leaf.NotAfter.UTC().Format(time.RFC3339))
	}
}

// Reach tries an address by TCP, as a dialler would.
func Reach(ctx context.Context, addr string) local.Check {
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	check := "reach " + addr
	began := time.Now()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err == nil {
		_ = c.Close()
		return local.Check{Check: check, OK: true, Detail: fmt.Sprintf("TCP answers after %v", time.Since(began).Round(time.Millisecond))}
	}
	var dns *net.DNSError
	var fix string
	switch {
	case errors.As(err, &dns):
		fix = fixName
	case errors.Is(err, syscall.ECONNREFUSED):
		fix = fixRefused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		fix = fixRoute
	default:
		fix = "nothing answers: a firewall between here and there drops TCP to that port (see docs/firewall.md), or the host is down"
	}
	return local.Check{Check: check, Detail: err.Error(), Fix: fix}
}

// Enrolled is the finding about a running role's identity; why says what its
// certificate waits for, and code how a new join code is made.
func Enrolled(id *identity.Identity, party string, why error, code string) local.Check {
	c := local.Check{Check: "identity", OK: true, Detail: party + ", key " + id.Fingerprint()}
	if why == nil {
		return c
	}
	c.OK, c.Detail = false, why.Error()
	if key := id.Fingerprint(); !strings.Contains(c.Detail, key) { // one that waits says it itself
		c.Detail += "; key " + key
	}
	c.Fix = "on the gateway: `sallyport request list` shows the request if it arrived; a new code from `" + code + "` is taken without a restart"
	return c
}

// Certificate is the finding about the certificate that a running role (here) has
// until end, the zero time before the first, and the gateway renews from renew on.
func Certificate(end, renew, now time.Time, here string) local.Check {
	c := local.Check{Check: "certificate"}
	left := end.Sub(now).Round(time.Minute)
	switch {
	case end.IsZero():
		c.Detail, c.Fix = "there is none yet", "see identity"
	case left <= 0:
		c.Detail = "it ended on " + end.UTC().Format(time.RFC3339)
		c.Fix = "let the gateway reach " + here + ": it renews an expired certificate with the same key, within its grace (after that: see identity)"
	case now.After(renew.Add(end.Sub(renew) / 3)):
		c.Detail = fmt.Sprintf("it ends in %s and should have been renewed", left)
		c.Fix = "see whether the gateway runs and reaches " + here
	default:
		c.OK = true
		c.Detail = fmt.Sprintf("good for another %s; renewed from %s on", left, renew.UTC().Format(time.RFC3339))
	}
	return c
}

// Channel is the finding about one upstream. One over which a party waits for
// its certificate is reached: what is missing is not on the way there. A party
// whose certificate is good comes so where that is not accepted.
func Channel(u wire.UpstreamStatus, waits bool) local.Check {
	c := local.Check{Check: "upstream " + u.Address, OK: u.State == "connected" || u.State == "enrolling" && waits, Detail: u.State}
	if !u.Since.IsZero() {
		c.Detail += " since " + u.Since.UTC().Format(time.RFC3339)
	}
	switch {
	case c.OK:
		c.Detail += fmt.Sprintf(" over %s, %s %s", u.Carrier, u.Role, u.ID)
	case u.State == "enrolling":
		c.Fix = fixAuthority
	case u.Error == "":
		c.Fix = "nobody has answered so far: see identity; else " + Upstream("")
	default:
		c.Detail += ": " + u.Error
		c.Fix = Upstream(u.Error)
	}
	return c
}

// Upstream says what to do about a channel that cannot be opened. The texts
// are those of the errors themselves.
func Upstream(text string) string {
	fix := upstream(text)
	if fix == fixUntrusted && strings.Contains(text, identity.WaitsItself) {
		return fixWaits
	}
	if strings.Contains(text, "through the HTTP proxy: ") && slices.Contains([]string{fixService, fixAuthority, fixUntrusted, fixFirewall}, fix) {
		return fix + fixProxyTLS
	}
	return fix
}

func upstream(text string) string {
	for _, f := range []struct {
		err error
		fix string
	}{
		{identity.ErrRevoked, "one side was revoked: `sallyport revocation list` on the gateway says which; a new join code enrols it again, after `sallyport local rejoin` on its host if it was away then and does not know it"},
		{identity.ErrWrongTrustDomain, fixForeign},
		{identity.ErrWrongRole, "another role answers at that address: correct it"},
		{identity.ErrWrongParty, "another RCP than the configured UUID answers: correct the address or the UUID"},
		{identity.ErrExpired, "a certificate is not good now: compare the clocks of both sides; see clock"},
		{identity.ErrUntrusted, fixUntrusted},
	} {
		if strings.Contains(text, f.err.Error()) {
			return f.fix
		}
	}
	for _, f := range []struct{ says, fix string }{
		{"h3 is demanded, and an HTTP proxy", fixProxyQUIC}, // these first: what follows "HTTP proxy" is of the proxy
		{"it wants authentication", fixProxyUser},
		{"it does not take the user and the password", fixProxyUser},
		{"no answer to CONNECT: ", fixProxyOdd},
		{": its answer ", fixProxyOdd},
		{"HTTP proxy: HTTPS_PROXY: ", fixProxyURL},
		{": it answered ", fixProxyNo},
		{": HTTP proxy ", fixProxy},
		{"no application protocol", fixService},
		{"first record does not look like a TLS handshake", fixService},
		{"handshake: EOF", fixService},
		{"x509: certificate is valid for ", fixForeign}, // the names are those of a trust domain
		{syscall.ECONNREFUSED.Error(), fixRefused},
		{"no such host", fixName},
		{syscall.ENETUNREACH.Error(), fixRoute},
		{syscall.EHOSTUNREACH.Error(), fixRoute},
	} {
		if strings.Contains(text, f.says) {
			return f.fix
		}
	}
	if strings.Contains(text, "unknown certificate authority") || strings.Contains(text, "unknown authority") {
		return fixAuthority
	}
	if strings.Contains(text, "the other side refuses us") {
		return fixRefusedUs
	}
	return fixFirewall
}
