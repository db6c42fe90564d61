package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"sallyport/config"
	"sallyport/internal/enroll"
	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/sealed"
	"sallyport/internal/wire"
)

// offline is enrolment by files, on the host of a node or an RCP that no
// gateway reaches. It works on the identity of a role that does not run.
type offline struct {
	*localRole
	pin         string // --ca-pin
	trustDomain string // --trust-domain
	join        string // --join
	name        string // --name
	passphrase  string // --passphrase-file
}

func (l *localRole) csrCommand() *cobra.Command {
	o := &offline{localRole: l}
	cmd := &cobra.Command{
		Use: "csr [FILE] {--ca-pin FINGERPRINT [--trust-domain NAME] | --join CODE-FILE} [--name NAME]", Short: "Write a certificate request to a file, for a host that no gateway reaches", Args: Between(0, 1),
		Long: "Make the key and the UUID of the node or RCP on this host, if there are none yet, and write its certificate request\n" +
			"to a new file, or to standard output. The private key stays here. On the gateway `sallyport request import FILE`\n" +
			"queues it, `request grant` and `request export ID FILE` answer it, and `local certificate import FILE` installs the\n" +
			"answer here. --ca-pin is the fingerprint of the gateway's root, as `sallyport ca pin` prints it there; a join code\n" +
			"names it too, and one without a token (`join create --manual`) name and tags besides. A token is never written into\n" +
			"the file. The role must not run.",
		RunE: func(_ *cobra.Command, args []string) error { return o.request(args) },
	}
	o.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&o.join, "join", "", "file with a join code, which names the root, the trust domain and perhaps the name; - is standard input")
	f.StringVar(&o.name, "name", "", "name to ask for (default that of the join code, else SALLYPORT_NODE_NAME)")
	return cmd
}

func (l *localRole) certificateCommand() *cobra.Command {
	o := &offline{localRole: l}
	cmd := &cobra.Command{
		Use: "import FILE|- [--ca-pin FINGERPRINT] [--passphrase-file FILE]", Short: "Install the certificate in a file from the gateway", Args: Exactly(1),
		Long: "Install the answer to the request of `local csr`, or a whole identity from `sallyport request bundle`, for which\n" +
			"--passphrase-file names the file with its passphrase. An answer must be for the key, the role and the UUID of this\n" +
			"host, lead to the root that the request pinned, and be sealed by a gateway. The role must not run; started after\n" +
			"that, it dials with its certificate.",
		RunE: func(_ *cobra.Command, args []string) error { return o.install(args[0]) },
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.passphrase, "passphrase-file", "", "file whose one line is the passphrase of a bundle")
	return Group("certificate", "The certificate of this host", cmd)
}

func (o *offline) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.pin, "ca-pin", "", "fingerprint of the gateway's root (SHA256:...), as sallyport ca pin prints it there")
	f.StringVar(&o.trustDomain, "trust-domain", "", "trust domain of the gateway, where it is not made from the root's key")
}

// request is `local csr`.
func (o *offline) request(args []string) (err error) {
	var code wire.JoinCode
	if o.join != "" {
		if o.pin != "" || o.trustDomain != "" {
			return Usage("give either --join or --ca-pin: a join code names root and trust domain")
		}
		text, err := o.readCode(o.join)
		if err != nil {
			return err
		}
		if code, err = wire.ParseJoinCode(text); err != nil {
			return fmt.Errorf("%s: %w", o.join, err)
		}
	}
	role, err := o.role(code.Role)
	if err != nil {
		return err
	}
	offer, err := o.offer(role, code)
	if err != nil {
		return err
	}
	root, td := code.Root, code.TrustDomain
	if o.pin != "" {
		if root, td, err = o.pinned(); err != nil {
			return err
		}
	}
	id, release, err := o.open(role, td, root != "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	if root != "" {
		if err := id.Pin(root, td); err != nil {
			return err
		}
	}
	env, err := enroll.Offline(id, offer)
	if errors.Is(err, identity.ErrNotPinned) {
		return errTrustNobody
	}
	if err != nil {
		return err
	}
	file, err := wire.AppendOffline(nil, wire.PEMOfflineRequest, env)
	if err != nil {
		return err
	}
	if err := o.write(args, file); err != nil {
		return err
	}
	pin, domain := id.Pinned()
	o.out.Note("%s %s%s of %s", id.Role(), id.ID(), prefixed(", ", offer.Name), domain)
	o.out.Note("fingerprint  %s", id.Fingerprint())
	o.out.Note("root         %s", pin.Fingerprint())
	o.out.Note("On the gateway: `sallyport request import FILE`, compare the fingerprint, `request grant`, `request export`.")
	return nil
}

// pinned reads --ca-pin and --trust-domain.
func (o *offline) pinned() (wire.KeyHash, string, error) {
	root, err := wire.ParseFingerprint(o.pin)
	if err != nil {
		return "", "", Usage("--ca-pin: %w", err)
	}
	td := o.trustDomain
	if td == "" {
		td = root.TrustDomain()
	}
	if !wire.ValidTrustDomain(td) {
		return "", "", Usage("--trust-domain: %q is no name of a trust domain", td)
	}
	return root, td, nil
}

var (
	// errTrustNobody is of a host that was told of no gateway yet.
	errTrustNobody = Usage("say whom to trust: --ca-pin with the fingerprint that `sallyport ca pin` prints on the gateway, or --join with a join code")
	errNoDirectory = errors.New("the role has no directory here")
)

// offer is what the role would say of itself if it ran.
func (o *offline) offer(role wire.Role, code wire.JoinCode) (enroll.Offer, error) {
	offer := enroll.Offer{Name: code.Name, Program: BuildVersion()}
	if code.Token == "" {
		offer.TokenID = code.TokenID
	}
	if role == wire.RoleNode {
		c, err := config.LoadNode(o.streams.Env)
		if err != nil {
			return offer, err
		}
		offer.Tags = c.Tags
		if offer.Name == "" {
			offer.Name = string(c.Name)
		}
	}
	if o.name != "" {
		if err := config.CheckName(o.name); err != nil {
			return offer, Usage("--name: %w", err)
		}
		offer.Name = o.name
	}
	if role == wire.RoleRCP && offer.Name == "" {
		return offer, Usage("--name: say which RCP this is, as in `sallyport rcp add NAME` on the gateway")
	}
	return offer, nil
}

// role chooses whose identity is meant: what a file or --role says, else the
// one that has a directory here, else the first that this program can be.
func (o *offline) role(said wire.Role) (wire.Role, error) {
	choice := wire.Role(o.choice)
	switch {
	case said != "" && choice != "" && said != choice:
		return "", Usage("--role %s: the file is for role %s", choice, said)
	case said != "":
		choice = said
	}
	var may, here []wire.Role
	c, err := o.operator()
	if err != nil {
		return "", err
	}
	for _, r := range o.roles {
		if r == wire.RoleGateway {
			continue
		}
		may = append(may, r)
		if _, err := os.Stat(c.Dir(string(r))); err == nil {
			here = append(here, r)
		}
		if r == choice {
			return r, nil
		}
	}
	switch {
	case choice != "":
		return "", Usage("%s: this program enrols no %s", choice, choice)
	case len(here) > 1:
		return "", Usage("both a node and an RCP live here; choose one with --role")
	case len(here) == 1:
		return here[0], nil
	}
	return may[0], nil
}

// open locks the directory of a role that does not run and opens its identity.
// A node has one for each gateway: td names it, and may be left out when there
// is but one. It makes one only if it is told whom to trust.
func (o *offline) open(role wire.Role, td string, told bool) (*identity.Identity, func() error, error) {
	dir, release, err := o.lock(role, told)
	if errors.Is(err, errNoDirectory) {
		return nil, nil, errTrustNobody
	}
	if err != nil {
		return nil, nil, err
	}
	id, err := func() (*identity.Identity, error) {
		where, err := identityDir(dir, role, td)
		if err != nil {
			return nil, err
		}
		return identity.Open(where, role)
	}()
	if err != nil {
		return nil, nil, errors.Join(err, release())
	}
	return id, release, nil
}

// lock locks the directory of a role, and makes it if it may; otherwise the error is
// errNoDirectory when there is none: what only works on what is there leaves nothing
// behind where SALLYPORT_DATA was mistyped.
func (o *offline) lock(role wire.Role, mayMake bool) (dir string, release func() error, err error) {
	c, err := o.operator()
	if err != nil {
		return "", nil, err
	}
	dir = c.Dir(string(role))
	if _, err := os.Stat(dir); !mayMake && errors.Is(err, fs.ErrNotExist) {
		return dir, nil, errNoDirectory
	}
	if err := ownedByUs(dir); err != nil {
		return "", nil, err
	}
	lock, err := lockdir.Acquire(dir)
	if errors.Is(err, lockdir.ErrLocked) {
		return "", nil, fmt.Errorf("stop the %s first: %w", role, err)
	}
	if err != nil {
		return "", nil, err
	}
	return dir, lock.Release, nil
}

// ownedByUs refuses to leave files that the role, run by another user, cannot
// read: root could write them.
func ownedByUs(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil { // it is made, by us: then SALLYPORT_DATA says whose it should be
		dir = filepath.Dir(dir)
		if fi, err = os.Stat(dir); err != nil {
			return nil
		}
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return Fail(ExitRefused, "%s belongs to the user with uid %d: run this as that user (sudo -u '#%d'), so that the role can read what is written", dir, st.Uid, st.Uid)
	}
	return nil
}

// identityDir is where the role, once it runs, looks for its identity.
func identityDir(dir string, role wire.Role, td string) (string, error) {
	if role != wire.RoleNode {
		return filepath.Join(dir, "identity"), nil
	}
	if td != "" {
		if !wire.ValidTrustDomain(td) {
			return "", Usage("%q is no name of a trust domain", wire.Quotable(td))
		}
		return filepath.Join(dir, td, "identity"), nil
	}
	found, err := filepath.Glob(filepath.Join(dir, "*", "identity"))
	switch {
	case err != nil:
		return "", err
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0:
		return "", errTrustNobody
	}
	return "", Usage("this node serves %d gateways: say which with --ca-pin", len(found))
}

// install is `local certificate import`.
func (o *offline) install(name string) error {
	b, err := o.read(name)
	if err != nil {
		return err
	}
	if bytes.HasPrefix(b, []byte(sealed.Magic)) {
		return o.adopt(name, b)
	}
	if o.passphrase != "" {
		return Usage("--passphrase-file: %s is not encrypted", name)
	}
	env, err := wire.ParseOffline(b, wire.PEMOfflineAnswer, wire.MaxOfflineAnswer)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	// Not verified yet: it only says whose identity to look at.
	var claim wire.OfflineAnswer
	if err := json.Unmarshal(env.Payload, &claim); err != nil {
		return fmt.Errorf("%s: %w", name, wire.ErrOfflineFile)
	}
	role, err := o.role(claim.Verdict.Party.Role)
	if err != nil {
		return err
	}
	stranger := func() error {
		return Fail(ExitRefused, "%s: this host has made no request for %s: `local csr` makes one, with its key", name, wire.Quotable(claim.Verdict.Party.TrustDomain))
	}
	dir, release, err := o.lock(role, false)
	if errors.Is(err, errNoDirectory) {
		return stranger()
	}
	if err != nil {
		return err
	}
	err = func() error {
		where, err := identityDir(dir, role, claim.Verdict.Party.TrustDomain)
		if err != nil {
			return err
		}
		if _, err := os.Stat(where); err != nil {
			return stranger()
		}
		id, err := identity.Open(where, role)
		if err != nil {
			return err
		}
		return o.finish(id, name, env)
	}()
	return errors.Join(err, release())
}

// adopt installs a bundle.
func (o *offline) adopt(name string, b []byte) error {
	if o.passphrase == "" {
		return Usage("%s is encrypted: name the file that holds its passphrase with --passphrase-file", name)
	}
	passphrase, err := passphraseFile(o.passphrase)
	if err != nil {
		return err
	}
	r, err := sealed.NewReader(bytes.NewReader(b), passphrase)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var bundle wire.OfflineBundle
	if err := wire.DecodeJSON(r, 2*wire.MaxOfflineAnswer, &bundle); err != nil {
		if errors.Is(err, sealed.ErrOpen) {
			return Fail(ExitRefused, "%s: %w", name, err)
		}
		return fmt.Errorf("%s: %w", name, err)
	}
	if bundle.Type != wire.TypeOfflineBundle {
		return Fail(ExitRefused, "%s: %w: it is encrypted, and no bundle of an identity", name, wire.ErrOfflineFile)
	}
	role, err := o.role(bundle.Role)
	if err != nil {
		return err
	}
	if err := o.agrees(bundle.Root, bundle.TrustDomain); err != nil {
		return err
	}
	dir, release, err := o.lock(role, true)
	if err != nil {
		return err
	}
	err = func() error {
		where, err := identityDir(dir, role, bundle.TrustDomain)
		if err != nil {
			return err
		}
		id, err := identity.Adopt(where, role, bundle)
		if err != nil {
			return Fail(ExitRefused, "%s: %w", name, err)
		}
		return o.finish(id, name, bundle.Answer)
	}()
	return errors.Join(err, release())
}

// agrees compares a root with --ca-pin, if that is given.
func (o *offline) agrees(root wire.KeyHash, td string) error {
	if o.pin == "" {
		return nil
	}
	pin, domain, err := o.pinned()
	if err != nil {
		return err
	}
	if pin != root || o.trustDomain != "" && domain != td {
		return Fail(ExitRefused, "the root that is pinned here is %s of %s, --ca-pin says %s", root.Fingerprint(), td, pin.Fingerprint())
	}
	return nil
}

func (o *offline) finish(id *identity.Identity, name string, env wire.Envelope) error {
	if err := o.agrees(id.Pinned()); err != nil {
		return err
	}
	a, err := enroll.Import(id, env)
	if err != nil {
		return Fail(ExitRefused, "%s: %w", name, err)
	}
	t := Table{Columns: []string{"role", "id", "name", "fingerprint", "trust_domain", "not_after"}}
	t.Add(string(id.Role()), string(id.ID()), a.Verdict.Name, id.Fingerprint(), id.TrustDomain(), Time(id.NotAfter()))
	if err := o.out.Print(map[string]any{"role": id.Role(), "id": id.ID(), "name": a.Verdict.Name, "fingerprint": id.Fingerprint(), "trust_domain": id.TrustDomain(), "not_after": id.NotAfter().UTC()}, t); err != nil {
		return err
	}
	o.out.Note("Start the %s now.", id.Role())
	return nil
}

// read reads a file, or standard input, up to the largest that we write.
func (o *offline) read(name string) ([]byte, error) {
	in := o.streams.In
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	const limit = 2 * wire.MaxOfflineAnswer
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > limit {
		return nil, fmt.Errorf("read %s: %w (%d bytes)", name, wire.ErrTooLarge, limit)
	}
	return b, nil
}

// write writes a new file that all may read, or to standard output.
func (o *offline) write(args []string, b []byte) error {
	if len(args) == 0 || args[0] == "-" {
		return o.out.Raw(b)
	}
	return NewFile(args[0], b, 0o644)
}

// NewFile writes a file that must not be there yet.
func NewFile(name string, b []byte, mode os.FileMode) error {
	f, err := ReserveFile(name, mode)
	if err != nil {
		return err
	}
	return f.Fill(b)
}

// ReservedFile is a new file, empty so far: what cannot be written is found out
// before anything is done that cannot be undone.
type ReservedFile struct{ f *os.File }

// ReserveFile makes a file that must not be there. It is for Fill or Remove.
func ReserveFile(name string, mode os.FileMode) (*ReservedFile, error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, os.ErrExist) {
		return nil, Fail(ExitRefused, "%s is there already: name a new file", name)
	}
	if err != nil {
		return nil, err
	}
	return &ReservedFile{f}, nil
}

// Fill writes the file and closes it, or removes it when that fails.
func (r *ReservedFile) Fill(b []byte) error {
	_, err := r.f.Write(b)
	if err == nil {
		err = r.f.Sync()
	}
	if err = errors.Join(err, r.f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", r.f.Name(), err), os.Remove(r.f.Name()))
	}
	return nil
}

// Remove takes back a file that was not filled.
func (r *ReservedFile) Remove() error { return errors.Join(r.f.Close(), os.Remove(r.f.Name())) }
