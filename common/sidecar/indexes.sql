CREATE INDEX nodes_by_key ON nodes (key);
CREATE INDEX nodes_by_file ON nodes (file, start_line);
CREATE INDEX files_by_path ON files (path);
CREATE INDEX edges_out ON edges (source, type, target);
CREATE INDEX edges_in ON edges (target, type, source);
CREATE INDEX edges_by_id ON edges (edge_id) WHERE edge_id IS NOT NULL;
CREATE INDEX memberships ON members (node, community);
CREATE INDEX steps_of ON process_steps (node, process, step);
CREATE INDEX hotspot_of ON hotspots (node);
