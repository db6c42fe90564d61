package wire

// IssueRequest asks the certificate authority for a leaf. Party, Name and
// Tenant are the registration authority's word; of the CSR (PKCS #10, DER)
// only the public key counts, and the proof that its owner made it.
type IssueRequest struct {
	Party  Party  `json:"party"`
	Name   string `json:"name,omitempty"`   // of a node
	Tenant string `json:"tenant,omitempty"` // of a node; empty: DefaultTenant
	CSR    []byte `json:"csr"`
}

// DefaultTenant is the tenant of an installation that has no others.
const DefaultTenant = "default"

// MaxName is the longest name of a node or an RCP, in bytes. It stands in a
// DNS name, and those end at 253.
const MaxName = 120

// ValidName tells whether a name may stand in a certificate, a URL path and a
// table: letters, digits, '-', '_', and '.' between them, as in host names.
func ValidName(s string) bool {
	if s == "" || len(s) > MaxName {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '-' || c == '_':
			if i == 0 {
				return false // it would read as an option
			}
		case c == '.':
			if i == 0 || i == len(s)-1 || s[i-1] == '.' {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// ValidPartyName is [ValidName] for nodes and RCPs: besides, the name may not
// read as the beginning of a UUID that changing calls take for one (8 hex
// digits or more), or it would name another party than it seems to.
func ValidPartyName(s string) bool { return ValidName(s) && !beginsUUID(s) }

// beginsUUID tells whether s is a whole UUID in lower case, or at least the
// first 8 digits of one.
func beginsUUID(s string) bool {
	if len(s) < 8 || len(s) > 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case (c < '0' || c > '9') && (c < 'a' || c > 'f'):
			return false
		}
	}
	return true
}
