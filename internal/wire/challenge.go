package wire

import "strings"

// challengePrefixes begin the names of ACME challenges among the targets; a colon
// stands in no policy's name.
var challengePrefixes = map[string]string{"http-01": "acme-http:", "tls-alpn-01": "acme-tls:"}

// maxChallengeHost leaves room for the prefix in the name of a target.
const maxChallengeHost = 240

// ChallengeTarget is the target of a node at which a challenge of a kind,
// http-01 or tls-alpn-01, is answered for a host.
func ChallengeTarget(kind, host string) string { return challengePrefixes[kind] + host }

// ParseChallengeTarget tells whether a target is a challenge.
func ParseChallengeTarget(target string) (kind, host string, ok bool) {
	for kind, prefix := range challengePrefixes {
		if host, ok := strings.CutPrefix(target, prefix); ok && host != "" && len(host) <= maxChallengeHost {
			return kind, host, true
		}
	}
	return "", "", false
}
