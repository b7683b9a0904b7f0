package trust

import "strings"

// Runs tells whether an engine's name is one that a device of that architecture, as Go names
// it, can have: the version that own says, which is the coordinator's, and that architecture.
// Names are as in "wazero/1.12.0 compiler amd64". They are a device's own word, and another
// engine may have other results; so a name that nobody can check stands for nothing.
func Runs(own, said, arch string) bool {
	is, has := strings.Fields(own), strings.Fields(said)
	if len(is) != 3 || len(has) != 3 || strings.Join(has, " ") != said || has[0] != is[0] || has[2] != arch {
		return false
	}
	// wazero has compilers for these two.
	return has[1] == "interpreter" || has[1] == "compiler" && (arch == "amd64" || arch == "arm64")
}
