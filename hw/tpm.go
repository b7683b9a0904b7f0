package hw

import "context"

// tpms reads what the kernel knows of trusted platform modules
// (Documentation/ABI/stable/sysfs-class-tpm). It sends them nothing.
func (p *prober) tpms(context.Context) (func(*Inventory), notes) {
	var missing notes
	found := []TPM{}
	for _, name := range p.list("sys/class/tpm") {
		dir := "sys/class/tpm/" + name
		m := TPM{Name: clean(name), Version: int(min(p.count(dir+"/tpm_version_major"), 1<<16)), Access: p.access("dev/" + name)}
		if m.Version == 0 { // the kernel says it since 5.6; before, only a TPM 1.2 lists its registers
			m.Version = 2
			if p.exists(dir+"/pcrs") || p.exists(dir+"/device/pcrs") {
				m.Version = 1
			}
		}
		if m.Version > 2 {
			missing.add("tpms", NoteImplausible, m.Name, "says that it is of a version that does not exist, and was left out")
			continue
		}
		missing.access("tpms", m.Name, m.Access)
		found = append(found, m)
	}
	return func(inv *Inventory) { inv.TPMs = found }, missing
}
